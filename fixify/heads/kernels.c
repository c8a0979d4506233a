/* A fixed classifier in float32 on a processor, one call for a batch; see kernels.py.
 *
 * Vectors are those of GCC and Clang: 16 numbers, which the compiler divides where registers are shorter. The file is
 * compiled once per instruction set. Nothing here allocates what outlives a call, and nothing is shared by threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined __AVX2__
#include <immintrin.h>
#endif

/* LANES: numbers in a vector. TILE: samples whose sums with signs are tabulated at once; CLASSES: classes, SLOTS: vectors of
 * the table, which stays in the first-level cache. FEW: samples at once where there are fewer than MANY. */
enum { LANES = 16, TILE = 64, CLASSES = 1024, SLOTS = 32, FEW = 3 };
#if defined __AVX2__
enum { MANY = 17 };
#else
enum { MANY = 2 }; /* without a fast `pick` */
#endif

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));

/* Mirrors `_Head` in kernels.py. */
typedef struct {
    int64_t num_features, num_classes;
    const float *center, *inverse_std; /* [N]; NULL: not standardised */
    const float *left, *right;         /* [a, a], and the transpose of [b, b] with rows of `width`; NULL: no transform */
    const float *signs;                /* [k, N]; NULL: all plus */
    int64_t a, b, width, num_blocks, num_rows; /* num_rows: rows of `left` that are needed */
    const uint8_t *packed;             /* [C / 16, planes * row_bytes, 16]; NULL: the classes are rows of the transform */
    int64_t num_signs, row_bytes, planes; /* of a class: signs and bytes per plane, planes */
    const int64_t *index;              /* [C], places among the scores; NULL: in order */
    const float *rows, *bias;          /* [C], or NULL */
    int64_t first;                     /* score of the first class */
    float scale, least_norm, plane_weights[4];
    int32_t normalize;
} head_t;

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float total(vec v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

static float dot(const float *a, const float *b, int64_t n) {
    vec sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int v = 0; v < 4; v++) sums[v] += load(a + i + v * LANES) * load(b + i + v * LANES);
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* C = A B, B with `columns` columns, a multiple of LANES, which is also the length of its rows and of those of C. */
#define MULTIPLY(R, V)                                                                                             \
    static inline __attribute__((always_inline)) void multiply_##R##_##V(const float *A, int64_t lda, const float *B, \
                                                                         int64_t columns, int64_t depth, float *C) { \
        vec sums[R][V] = {{{0}}};                                                                                  \
        for (int64_t k = 0; k < depth; k++) {                                                                      \
            vec row[V];                                                                                            \
            for (int v = 0; v < V; v++) row[v] = load(B + k * columns + v * LANES);                                \
            for (int r = 0; r < R; r++)                                                                            \
                for (int v = 0; v < V; v++) sums[r][v] += A[r * lda + k] * row[v];                                 \
        }                                                                                                          \
        for (int r = 0; r < R; r++)                                                                                \
            for (int v = 0; v < V; v++) store(C + r * columns + v * LANES, sums[r][v]);                            \
    }
MULTIPLY(4, 1) MULTIPLY(4, 2) MULTIPLY(4, 3) MULTIPLY(4, 4) MULTIPLY(1, 1) MULTIPLY(1, 2) MULTIPLY(1, 3) MULTIPLY(1, 4)

static void multiply(const float *A, int64_t lda, int64_t rows, const float *B, int64_t columns, int64_t depth, float *C) {
    for (int64_t at = 0; at < columns; at += 4 * LANES) {
        int64_t i = 0;
        switch (least(columns - at, 4 * LANES) / LANES) {
#define PANEL(V)                                                                                             \
    case V:                                                                                                  \
        for (; i + 4 <= rows; i += 4) multiply_4_##V(A + i * lda, lda, B + at, columns, depth, C + i * columns + at); \
        for (; i < rows; i++) multiply_1_##V(A + i * lda, lda, B + at, columns, depth, C + i * columns + at);          \
        break;
            PANEL(1) PANEL(2) PANEL(3) PANEL(4)
        }
    }
}

/* Standardise a sample; return its norm, or 1 if features are not normalised. */
static float standardise(const head_t *h, const float *x, float *z) {
    int64_t n = h->num_features;
    if (h->center && h->inverse_std) for (int64_t i = 0; i < n; i++) z[i] = (x[i] - h->center[i]) * h->inverse_std[i];
    else if (h->center) for (int64_t i = 0; i < n; i++) z[i] = x[i] - h->center[i];
    else memcpy(z, x, n * sizeof *z);
    if (!h->normalize) return 1;
    float norm = sqrtf(dot(z, z, n));
    return norm < h->least_norm ? h->least_norm : norm;
}

/* Multiply a sample with a block, left (x) right: scores of rows of `width`. `spare`: N + a * width numbers. */
static void transform(const head_t *h, const float *z, int64_t block, float *scores, float *spare) {
    int64_t n = h->num_features;
    if (h->signs) {
        const float *signs = h->signs + block * n;
        for (int64_t i = 0; i < n; i++) spare[i] = z[i] * signs[i];
        z = spare;
    }
    float *half = spare + n;
    multiply(z, h->b, h->a, h->right, h->width, h->b, half);
    multiply(h->left, h->a, h->num_rows, half, h->width, h->a, scores);
}

static void finish(const head_t *h, const float *scores, int64_t count, float by, int64_t at, float *out) {
    const float *bias = h->bias ? h->bias + at : NULL, *rows = h->rows ? h->rows + at : NULL;
    out += at;
    if (rows && bias) for (int64_t i = 0; i < count; i++) out[i] = bias[i] + scores[i] * rows[i] * by;
    else if (rows) for (int64_t i = 0; i < count; i++) out[i] = scores[i] * rows[i] * by;
    else if (bias) for (int64_t i = 0; i < count; i++) out[i] = bias[i] + scores[i] * by;
    else for (int64_t i = 0; i < count; i++) out[i] = scores[i] * by;
}

/* Write the scores from `first` on to classes from `at` on, `count` at most. */
static void finish_rows(const head_t *h, const float *scores, int64_t first, int64_t count, float by, int64_t at, float *out) {
    for (int64_t i = first; i < first + count;) {
        int64_t column = i % h->b, length = least(h->b - column, first + count - i);
        finish(h, scores + i / h->b * h->width + column, length, by, at + i - first, out);
        i += length;
    }
}

static void blocks_of_one(const head_t *h, const float *x, float *out, float *memory) {
    int64_t n = h->num_features, c = h->num_classes, size = h->a * h->width;
    float *z = memory, *spare = z + n, *scores = spare + n + size;
    float by = h->scale / standardise(h, x, z);
    for (int64_t k = 0; k < h->num_blocks; k++) {
        float *found = h->index ? scores + k * size : scores;
        transform(h, z, k, found, spare);
        if (h->index) continue;
        if (c <= n) {
            finish_rows(h, found, h->first, c, by, 0, out);
        } else {
            int64_t at = 2 * n * k;
            finish_rows(h, found, 0, least(n, c - at), by, at, out);
            if (c > at + n) finish_rows(h, found, 0, least(n, c - at - n), -by, at + n, out);
        }
    }
    if (h->index)
        for (int64_t i = 0; i < c; i++)
            out[i] = (h->bias ? h->bias[i] : 0) + scores[h->index[i]] * (h->rows ? h->rows[i] : 1) * by;
}

/* The coordinates that packed signs are multiplied with, [planes, 8 row_bytes]; unused ones are 0. */
static float coordinates(const head_t *h, const float *x, float *y, float *memory) {
    int64_t n = h->num_features, stride = 8 * h->row_bytes;
    float *z = h->right ? memory : y;
    float by = h->scale / standardise(h, x, z);
    if (h->right) {
        float *spare = z + n, *scores = spare + n + h->a * h->width;
        transform(h, z, 0, scores, spare);
        for (int64_t i = 0; i < h->num_signs; i += h->b)
            memcpy(y + i, scores + i / h->b * h->width, least(h->b, h->num_signs - i) * sizeof *y);
    }
    for (int64_t i = h->num_signs; i < stride; i++) y[i] = 0;
    for (int64_t p = h->planes - 1; p >= 0; p--)
        for (int64_t i = 0; i < stride; i++) y[p * stride + i] = y[i] * h->plane_weights[p];
    return by;
}

/* Element index[i] % 16 of a table, for each i. */
static inline vec pick(vec table, ivec index) {
#if defined __AVX512F__
    return (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined __AVX2__
    union { vec all; __m256 half[2]; } from = {table}, to;
    union { ivec all; __m256i half[2]; } at = {index};
    for (int i = 0; i < 2; i++) {
        __m256 low = _mm256_permutevar8x32_ps(from.half[0], at.half[i]);
        __m256 high = _mm256_permutevar8x32_ps(from.half[1], at.half[i]);
        to.half[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at.half[i], 28)));
    }
    return to.all;
#else
    vec found;
    for (int i = 0; i < LANES; i++) found[i] = table[index[i] & 15];
    return found;
#endif
}

static inline ivec widen(const uint8_t *bytes) {
#if defined __AVX512F__
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
#elif defined __AVX2__
    union { __m256i half[2]; ivec all; } wide;
    for (int i = 0; i < 2; i++) wide.half[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + 8 * i)));
    return wide.all;
#else
    ivec wide;
    for (int i = 0; i < LANES; i++) wide[i] = bytes[i];
    return wide;
#endif
}

/* Tabulate the 16 signed sums of every four coordinates: [coordinates / 4, 16], a vector each. */
static void tabulate(const float *y, int64_t count, float *tables) {
    const vec s0 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    const vec s1 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const vec s2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const vec s3 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    for (int64_t i = 0; i < count; i += 4)
        store(tables + 4 * i, (y[i] * s0 + y[i + 1] * s1) + (y[i + 2] * s2 + y[i + 3] * s3));
}

/* Scores of classes c0 to c1, c0 a multiple of LANES, for S samples, whose tables are `apart` numbers apart. */
#define SIGNS_OF_FEW(S)                                                                                             \
    static void signs_of_##S(const head_t *h, const float *tables, int64_t apart, const float *by, int64_t c0,      \
                             int64_t c1, float *out) {                                                              \
        enum { R = 4 };                                                                                             \
        int64_t bytes = h->planes * h->row_bytes, size = bytes * LANES;                                             \
        for (int64_t c = c0; c < c1; c += R * LANES) {                                                              \
            int64_t blocks = least(R, up(c1 - c, LANES) / LANES);                                                   \
            const uint8_t *packed = h->packed + c * bytes;                                                          \
            vec sums[S][R] = {{{0}}};                                                                               \
            for (int64_t j = 0; j < bytes; j++) {                                                                   \
                vec first[S], last[S];                                                                              \
                for (int s = 0; s < S; s++) {                                                                       \
                    first[s] = load(tables + s * apart + 2 * j * LANES);                                            \
                    last[s] = load(tables + s * apart + (2 * j + 1) * LANES);                                       \
                }                                                                                                   \
                for (int r = 0; r < R; r++) {                                                                       \
                    ivec both = widen(packed + (r < blocks ? r : 0) * size + j * LANES);                            \
                    for (int s = 0; s < S; s++) sums[s][r] += pick(first[s], both >> 4) + pick(last[s], both);      \
                }                                                                                                   \
            }                                                                                                       \
            for (int s = 0; s < S; s++) {                                                                           \
                float scores[R * LANES];                                                                            \
                for (int r = 0; r < R; r++) store(scores + r * LANES, sums[s][r]);                                  \
                finish(h, scores, least(R * LANES, c1 - c), by[s], c, out + s * h->num_classes);                    \
            }                                                                                                       \
        }                                                                                                           \
    }
SIGNS_OF_FEW(1) SIGNS_OF_FEW(2) SIGNS_OF_FEW(3)

static void signs_of_few(const head_t *h, const float *x, int64_t m, int64_t c0, int64_t c1, float *out, float *memory) {
    int64_t depth = 8 * h->planes * h->row_bytes;
    float by[FEW], *tables = memory + depth, *spare = tables + FEW * 4 * depth;
    for (int64_t s = 0; s < m; s++) {
        by[s] = coordinates(h, x + s * h->num_features, memory, spare);
        tabulate(memory, depth, tables + s * 4 * depth);
    }
    if (m == 1) signs_of_1(h, tables, 4 * depth, by, c0, c1, out);
    if (m == 2) signs_of_2(h, tables, 4 * depth, by, c0, c1, out);
    if (m == 3) signs_of_3(h, tables, 4 * depth, by, c0, c1, out);
}

/* Transpose 16 x 16 numbers. */
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
static inline void transpose(const float *from, int64_t ld_from, float *to, int64_t ld_to) {
    vec r[LANES], s[LANES];
    for (int i = 0; i < LANES; i++) r[i] = load(from + i * ld_from);
    for (int i = 0; i < 8; i++) {
        s[2 * i] = PICK(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        s[2 * i + 1] = PICK(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 8; i++) {
        r[2 * i] = PICK(s[i], s[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        r[2 * i + 1] = PICK(s[i], s[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 8; i++) {
        s[2 * i] = PICK(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        s[2 * i + 1] = PICK(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 8; i++) {
        store(to + 2 * i * ld_to, PICK(s[i], s[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        store(to + (2 * i + 1) * ld_to, PICK(s[i], s[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
}

/* Add the scores of classes for 16 V samples, yt [coordinates, 16 V], to sums [classes, 16 V]: of four coordinates all 16
 * signed sums are tabulated, and a half byte of signs picks one. */
#define ADD(V)                                                                                              \
    {                                                                                                       \
        uint8_t both = half[g / 2 * LANES];                                                                 \
        for (int v = 0; v < V; v++) s[v] += table[g][both >> 4][v] + table[g + 1][both & 15][v];             \
    }
#define TABULATED(V)                                                                                             \
    static void tabulated_##V(const uint8_t *packed, int64_t bytes, int64_t count, const float *yt, float *sums) { \
        enum { G = SLOTS / V, M = V * LANES };                                                                   \
        vec table[G][16][V] __attribute__((aligned(64)));                                                        \
        memset(sums, 0, count * M * sizeof *sums);                                                               \
        for (int64_t from = 0; from < 2 * bytes; from += G) {                                                    \
            int groups = (int)least(G, 2 * bytes - from);                                                        \
            for (int g = 0; g < groups; g++)                                                                     \
                for (int v = 0; v < V; v++) {                                                                    \
                    const float *y = yt + (from + g) * 4 * M + v * LANES;                                        \
                    vec y0 = load(y), y1 = load(y + M), y2 = load(y + 2 * M), y3 = load(y + 3 * M);              \
                    vec first[4] = {y0 + y1, y0 - y1, y1 - y0, -y0 - y1};                                        \
                    vec last[4] = {y2 + y3, y2 - y3, y3 - y2, -y2 - y3};                                         \
                    for (int i = 0; i < 16; i++) table[g][i][v] = first[i >> 2] + last[i & 3];                   \
                }                                                                                                \
            for (int64_t c = 0; c < count; c++) {                                                                \
                const uint8_t *half = packed + c / LANES * LANES * bytes + from / 2 * LANES + c % LANES;         \
                vec s[V];                                                                                        \
                for (int v = 0; v < V; v++) s[v] = load(sums + c * M + v * LANES);                               \
                if (groups == G) {                                                                               \
                    _Pragma("GCC unroll 16") for (int g = 0; g < G; g += 2) ADD(V)                               \
                } else                                                                                           \
                    for (int g = 0; g < groups; g += 2) ADD(V)                                                   \
                for (int v = 0; v < V; v++) store(sums + c * M + v * LANES, s[v]);                               \
            }                                                                                                    \
        }                                                                                                        \
    }
TABULATED(1) TABULATED(2) TABULATED(4)

static void signs_of_many(const head_t *h, const float *x, int64_t m, int64_t c0, int64_t c1, float *out, float *memory) {
    int64_t depth = 8 * h->planes * h->row_bytes, n = h->num_features, bytes = h->planes * h->row_bytes;
    int64_t lanes = m <= 16 ? 16 : m <= 32 ? 32 : 64;
    float by[TILE] = {0};
    float *yt = memory, *sums = yt + up(depth, LANES) * lanes, *y = sums + CLASSES * lanes, *spare = y + LANES * up(depth, LANES);
    for (int64_t s = 0; s < lanes; s += LANES) {
        for (int64_t i = 0; i < LANES; i++) {
            float *row = y + i * up(depth, LANES);
            if (s + i < m) by[s + i] = coordinates(h, x + (s + i) * n, row, spare);
            else memset(row, 0, depth * sizeof *row);
        }
        for (int64_t j = 0; j < depth; j += LANES) transpose(y + j, up(depth, LANES), yt + j * lanes + s, lanes);
    }
    for (int64_t c = c0; c < c1; c += CLASSES) {
        int64_t count = least(CLASSES, c1 - c);
        const uint8_t *packed = h->packed + c * bytes;
        if (lanes == 16) tabulated_1(packed, bytes, count, yt, sums);
        else if (lanes == 32) tabulated_2(packed, bytes, count, yt, sums);
        else tabulated_4(packed, bytes, count, yt, sums);
        for (int64_t i = 0; i < count; i += LANES) {
            int64_t some = least(LANES, count - i);
            for (int64_t s = 0; s < m; s += LANES) {
                float turned[LANES * LANES];
                transpose(sums + i * lanes + s, lanes, turned, LANES);
                for (int64_t r = 0; r < least(LANES, m - s); r++)
                    finish(h, turned + r * LANES, some, by[s + r], c + i, out + (s + r) * h->num_classes);
            }
        }
    }
}

/* Compute logits [m, C] of x [m, N], of the classes c0 to c1 if codes are packed. Return 0, or -1 if memory lacks. */
static int logits(const head_t *h, const float *x, int64_t m, int64_t c0, int64_t c1, float *out) {
    int64_t n = h->num_features, c = h->num_classes, size = h->a * h->width;
    int64_t depth = 8 * h->planes * h->row_bytes;
    int64_t numbers = 2 * n + 2 * size + (h->index ? h->num_blocks * size : 0) + 4 * LANES;
    if (h->packed) numbers += m < MANY ? (1 + 4 * FEW) * depth : (depth + LANES) * (TILE + LANES) + CLASSES * TILE;
    float *memory = malloc(numbers * sizeof *memory);
    if (!memory) return -1;
    for (int64_t i = 0; i < m;) {
        int64_t some = h->packed ? least(m - i < MANY ? FEW : TILE, m - i) : 1;
        const float *from = x + i * n;
        float *to = out + i * c;
        if (!h->packed) blocks_of_one(h, from, to, memory);
        else if (m - i < MANY) signs_of_few(h, from, some, c0, c1, to, memory);
        else signs_of_many(h, from, some, c0, c1, to, memory);
        i += some;
    }
    free(memory);
    return 0;
}

/* Gradients of m samples x [m, N], whose codes are rows of one block, from those of their logits, grad [m, C].
 * of_x: [m, N]; of_scale: [m]. left_t: transpose of `left`; right: [b, b] with rows of `width`, not transposed. */
static int gradients(const head_t *h, const float *left_t, const float *right, const float *x, const float *grad, int64_t m,
                     float *of_x, float *of_scale) {
    int64_t n = h->num_features, c = h->num_classes, b = h->b, width = h->width, size = h->a * width;
    float *memory = malloc((2 * n + 3 * size) * sizeof *memory);
    if (!memory) return -1;
    float *z = memory, *found = z + n, *rows = found + n, *half = rows + size, *turned = half + size;
    for (int64_t s = 0; s < m; s++, x += n, grad += c, of_x += n) {
        float norm = standardise(h, x, z);
        memset(rows, 0, size * sizeof *rows);
        if (h->index) for (int64_t i = 0; i < c; i++) rows[h->index[i]] += grad[i] * h->rows[i];
        else
            for (int64_t i = 0; i < c;) {
                int64_t at = h->first + i, length = least(b - at % b, c - i);
                memcpy(rows + at / b * width + at % b, grad + i, length * sizeof *rows);
                i += length;
            }
        multiply(left_t, h->a, h->a, rows, width, h->a, half);
        multiply(half, width, h->a, right, width, b, turned);
        for (int64_t i = 0; i < h->a; i++) memcpy(found + i * b, turned + i * width, b * sizeof *found);
        if (h->signs) for (int64_t i = 0; i < n; i++) found[i] *= h->signs[i];
        float along = dot(found, z, n) / norm, outward = norm > h->least_norm ? along / norm : 0, by = h->scale / norm;
        of_scale[s] = along;
        if (h->inverse_std) for (int64_t i = 0; i < n; i++) of_x[i] = (found[i] - z[i] * outward) * by * h->inverse_std[i];
        else for (int64_t i = 0; i < n; i++) of_x[i] = (found[i] - z[i] * outward) * by;
    }
    free(memory);
    return 0;
}

/* One call for a batch: logits, or gradients if `grad` is given. */
typedef struct {
    const head_t *head;
    const float *x, *left_t, *right, *grad;
    float *out, *of_scale;
    int64_t m, parts, next;
    int by_class, failed;
} job_t;

static void work(void *data) {
    job_t *job = data;
    int64_t n = job->head->num_features, c = job->head->num_classes;
    for (int64_t i; (i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->parts;) {
        int64_t all = job->by_class ? c : job->m, each = up(up(all, job->parts) / job->parts, job->by_class ? LANES : 1);
        int64_t from = least(i * each, all), count = least(each, all - from);
        const float *x = job->x + from * n;
        int failed = 0;
        if (!count) continue;
        if (job->by_class) failed = logits(job->head, job->x, job->m, from, from + count, job->out);
        else if (!job->grad) failed = logits(job->head, x, count, 0, c, job->out + from * c);
        else failed = gradients(job->head, job->left_t, job->right, x, job->grad + from * c, count, job->out + from * n,
                                job->of_scale + from);
        if (failed) __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    }
}

/* GOMP_parallel of the OpenMP that torch uses, so that its threads do the work. */
typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);

static int run(job_t *job, int64_t threads, parallel_t parallel) {
    job->parts = threads;
    if (threads < 2) work(job);
    else parallel(work, job, (unsigned)threads, 0);
    return job->failed ? -1 : 0;
}

int fixify_interface(void) { return 1; }
int fixify_size_of_head(void) { return sizeof(head_t); }

/* Compute logits [m, C] of x [m, N], both contiguous. Returns 0, or -1 if there is not enough memory. */
int fixify_logits(const head_t *h, const float *x, int64_t m, float *out, int64_t threads, parallel_t parallel) {
    job_t job = {.head = h, .x = x, .m = m, .out = out};
    job.by_class = threads > 1 && h->packed && m < threads * TILE;
    return run(&job, threads, parallel);
}

/* Compute `gradients`, of contiguous arrays. Returns 0, or -1 if there is not enough memory. */
int fixify_gradients(const head_t *h, const float *left_t, const float *right, const float *x, const float *grad, int64_t m,
                     float *of_x, float *of_scale, int64_t threads, parallel_t parallel) {
    job_t job = {.head = h, .x = x, .m = m, .out = of_x};
    job.left_t = left_t, job.right = right, job.grad = grad, job.of_scale = of_scale;
    return run(&job, threads, parallel);
}
