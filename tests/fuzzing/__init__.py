"""Feed damaged and hostile files to everything that reads files, and judge what comes out.

    PYTHONPATH=tests python -m fuzzing --inputs 100000
    PYTHONPATH=tests python -m fuzzing --kinds pickle --start 4711 --inputs 1   # one input again

An input is a kind and a number: the number is the seed of everything that is random in it. `mutations` changes values
and bytes, `kinds` says what is changed and how it is read, `judge` runs the inputs in processes of their own, `fallen`
keeps what fell once.
"""
