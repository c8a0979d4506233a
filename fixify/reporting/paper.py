"""Show the figures of Hoffer, Hubara & Soudry, "Fix your classifier" (ICLR 2018), beside those counted here.

Only the paper's figures are stored here. Every network is built on the meta device and counted, and results of training
are read from the shipped recipes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fixify.language.model import assemble
from fixify.language.options import LanguageOptions
from fixify.models.architectures import build, parse_architecture
from fixify.models.build import build_on_meta
from fixify.models.classifiers import find_classifiers
from fixify.reporting.layout import human_bytes, new_table
from fixify.reporting.measured import RunHere, WordsHere, run_here, run_here_tables, words_here_tables
from fixify.savings import classifier_weights, count_parameters

_GRADIENT_BYTES = 4  # float32

_DATA_NAMES = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagenet"}
WIKITEXT2_WORDS = 33_278
LSTM_WIDTH = 512
NOT_RUN = "not run here"


@dataclass(frozen=True)
class Counted:
    """A network of the paper as it is built here.

    Attributes:
        name: The paper's name, shortened.
        built: How it is built: an architecture's name, or "torch".
        data: The data that it is trained on.
        num_features: N.
        num_classes: C.
        parameters: Learned parameters with a learned classifier.
        fixed_weights: Those that become fixed: the classifier's weights, without the bias (in the language model the
            embedding's too).
    """

    name: str
    built: str
    data: str
    num_features: int
    num_classes: int
    parameters: int
    fixed_weights: int

    @property
    def share(self) -> float:
        """Fixed weights, percent of all parameters."""
        return 100 * self.fixed_weights / self.parameters

    @property
    def learned_left(self) -> int:
        """Parameters that are still learned: backbone, bias, and the scale."""
        return self.parameters - self.fixed_weights + 1

    @property
    def gradient_bytes(self) -> int:
        """Bytes of float32 gradients that each update sends between processes with a learned classifier."""
        return _GRADIENT_BYTES * self.parameters

    @property
    def gradient_bytes_saved(self) -> int:
        """Bytes of them that a fixed classifier does not send (section 4.1)."""
        return _GRADIENT_BYTES * (self.parameters - self.learned_left)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, with what is derived."""
        return asdict(self) | {
            "share": self.share,
            "learned_left": self.learned_left,
            "gradient_bytes": self.gradient_bytes,
            "gradient_bytes_saved": self.gradient_bytes_saved,
        }


@dataclass(frozen=True)
class Printed:
    """A row as the paper prints it. Numbers that are compared as text keep their digits.

    Attributes:
        parameters: "# Params".
        share: "% Fixed params", without the sign.
        learned: Validation accuracy in percent (Table 1) or perplexity (Table 2) with a learned classifier.
        fixed: The same with a fixed one.
    """

    parameters: int
    share: str
    learned: str
    fixed: str


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 1 or 2, or a case of section 4 that has no printed figures.

    Attributes:
        counted: The network.
        printed: The paper's figures.
        notes: Remarks on the difference between the two.
        ours: What a shipped recipe has measured with it on this data; None if it was not run here.
    """

    counted: Counted
    printed: Printed | None
    notes: tuple[str, ...]
    ours: RunHere | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "counted": self.counted.to_dict(),
            "paper": None if self.printed is None else asdict(self.printed),
            "ours": None if self.ours is None else self.ours.to_dict(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Paper:
    """The paper's tables beside our counts and results.

    Attributes:
        table1: Table 1, image classification.
        table2: Table 2, the language model.
        section4: Section 4.1 (JFT-300M) and 4.2 (C > N).
        run_here: What the shipped recipes have measured for images, mostly on other data than the paper's.
        words_here: The same for language models.
    """

    table1: tuple[PaperRow, ...]
    table2: tuple[PaperRow, ...]
    section4: tuple[PaperRow, ...]
    run_here: tuple[RunHere, ...]
    words_here: tuple[WordsHere, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify report --paper --json` prints."""
        parts = ("table1", "table2", "section4", "run_here", "words_here")
        return {name: [row.to_dict() for row in getattr(self, name)] for name in parts}


def paper() -> Paper:
    """Build and count every network of the paper; this takes some seconds."""
    image_rows = (
        ("ResNet-56", "resnet56_cifar", "CIFAR-10", Printed(855_770, "0.07", "93.03", "93.14")),
        ("DenseNet-BC", "densenet100_bc_cifar", "CIFAR-100", Printed(800_032, "4.2", "77.73", "77.67")),
        ("ResNet-50", "resnet50", "ImageNet", Printed(25_557_032, "8.01", "75.3", "75.3")),
        ("DenseNet-169", "densenet169", "ImageNet", Printed(14_149_480, "11.76", "76.2", "76")),
        ("ShuffleNet", "shufflenet_v1_g3", "ImageNet", Printed(1_826_555, "52.56", "65.9", "65.4")),
    )
    here, words = run_here()
    return Paper(
        table1=tuple(
            _row(_image_network(name, built, data), printed, here=here) for name, built, data, printed in image_rows
        ),
        table2=(_row(_language_model(), Printed(38_312_446, "88.94", "74.1", "81.2")),),
        section4=(
            _jft(),
            _row(_image_network("MobileNet 0.5", "mobilenet_v1_050", "ImageNet"), None, here=here),
            _row(_image_network("ResNet, N=256", "resnet18_050", "ImageNet"), None, _WHICH_RESNET, here=here),
        ),
        run_here=here,
        words_here=words,
    )


_WHICH_RESNET = "the paper does not say which reduced ResNet it used; this is ResNet-18 with half its channels"


def _language_model() -> Counted:
    """Count the language model.

    The printed total is that of torch's LSTM (two bias vectors per layer) with a separate embedding and classifier; the
    classifier has a bias.
    """
    options = LanguageOptions.create(words="learned", num_features=LSTM_WIDTH)
    model = build_on_meta(lambda: assemble(options, WIKITEXT2_WORDS, None))
    shared = sum(model.get_parameter(f"{name}.weight").numel() for name in ("embedding", "classifier"))
    size = count_parameters(model)
    return Counted("2-layer LSTM", "torch", "WikiText-2", LSTM_WIDTH, WIKITEXT2_WORDS, size, shared)


def _image_network(name: str, built: str, data: str, num_classes: int | None = None) -> Counted:
    architecture = parse_architecture(built)
    model = build(architecture, num_classes=num_classes, meta=True)
    (site,) = find_classifiers(model, architecture)
    return Counted(
        name, built, data, site.num_features, site.num_classes, count_parameters(model), classifier_weights(site)
    )


def _jft() -> PaperRow:
    """Count section 4.1: ResNet-50 on JFT-300M, with the 18,291 classes of Sun et al. (2017)."""
    counted = _image_network("ResNet-50", "resnet50", "JFT-300M", 18_291)
    holds = counted.fixed_weights > 36e6 and counted.share > 60
    said = (
        f'the paper: "over 36M parameters", "over 60%" of the model in the classifier; counted: '
        f"{counted.fixed_weights:,} weights, {counted.share:.1f} %"
    )
    return PaperRow(counted, None, (said if holds else f"{said}: the paper's statement does not hold",))


def _row(counted: Counted, printed: Printed | None, *notes: str, here: Iterable[RunHere] = ()) -> PaperRow:
    if printed is not None:
        notes += (*_count_notes(counted, printed.parameters), *_share_notes(counted, printed.share))
    ours = (run for run in here if (run.network, run.data_name) == (counted.built, _DATA_NAMES[counted.data]))
    return PaperRow(counted, printed, notes, next(ours, None))


def _count_notes(counted: Counted, printed: int) -> tuple[str, ...]:
    difference = printed - counted.parameters
    if difference == 0:
        return ()
    if counted.built == "shufflenet_v1_g3" and difference == 1:
        return (
            "the paper counts 1 more. All tensors of a ShuffleNet have an even size, so the odd total has a single "
            "number more: presumably the scale of the fixed classifier. As published the network has 1,865,728 "
            "parameters; biases and widths here give the printed number (fixify/models/networks)",
        )
    return (f"the paper counts {abs(difference):,} {'more' if difference > 0 else 'fewer'}; the reason is unknown",)


def _share_notes(counted: Counted, printed: str) -> tuple[str, ...]:
    digits = len(printed.partition(".")[2])
    if f"{counted.share:.{digits}f}" == printed:
        return ()
    if math.floor(counted.share * 10**digits) == round(float(printed) * 10**digits):
        return (f"the share is {counted.share:.2f} %; the paper's {printed} % is cut off, not rounded",)
    return (f"the share is {counted.share:.2f} %, the paper's {printed} %; the reason is unknown",)


def paper_tables(found: Paper) -> list[Table | str]:
    """Show counts, results and gradients of the paper's networks, with notes. The tables fit 80 columns."""
    printed = (*found.table1, *found.table2)
    everything = (*printed, *found.section4)
    return [
        _counts("Tables 1 and 2: parameters, and the share that becomes fixed", printed, section4=False),
        "",
        _results("Table 1: validation accuracy, %", found.table1),
        "",
        _results("Table 2: validation perplexity", found.table2),
        "",
        _counts("Section 4.1 (JFT-300M) and 4.2 (more classes than features)", found.section4, section4=True),
        "",
        _gradients(everything),
        "",
        *run_here_tables(found.run_here),
        "",
        *words_here_tables(found.words_here),
        *_notes(everything),
    ]


def _counts(title: str, rows: Sequence[PaperRow], *, section4: bool) -> Table:
    paper = () if section4 else (">paper",)
    made = new_table("network", "data", ">N", ">C", *paper, ">counted", *paper, ">share", title=title)
    for row in rows:
        counted, printed = row.counted, row.printed
        sizes = [f"{counted.parameters:,}" + ("" if not row.notes else " *")]
        shares = [f"{counted.share:.2f} %"]
        if printed is not None:
            sizes.insert(0, f"{printed.parameters:,}")
            shares.insert(0, f"{printed.share} %")
        made.add_row(counted.name, counted.data, str(counted.num_features), str(counted.num_classes), *sizes, *shares)
    return made


def _results(title: str, rows: Iterable[PaperRow]) -> Table:
    made = new_table(
        "network", "data", ">learned\n(paper)", ">fixed\n(paper)", ">learned\n(here)", ">fixed\n(here)", title=title
    )
    for row in rows:
        if row.printed is not None:
            ours = (NOT_RUN, "") if row.ours is None else (row.ours.learned.lines(), row.ours.fixed.lines())
            made.add_row(row.counted.name, row.counted.data, row.printed.learned, row.printed.fixed, *ours)
    return made


def _gradients(rows: Iterable[PaperRow]) -> Table:
    title = "Gradients sent per update (float32), by arithmetic"
    made = new_table("network", "data", ">learned", ">fixed", ">saved", title=title)
    for row in rows:
        counted = row.counted
        saved = counted.gradient_bytes_saved
        made.add_row(
            counted.name,
            counted.data,
            human_bytes(counted.gradient_bytes),
            human_bytes(counted.gradient_bytes - saved),
            f"{human_bytes(saved)} ({100 * saved / counted.gradient_bytes:.1f} %)",
        )
    return made


def _notes(rows: Iterable[PaperRow]) -> list[str]:
    return [f"* {row.counted.name}: {note}." for row in rows for note in row.notes]
