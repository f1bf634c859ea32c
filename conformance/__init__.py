"""The judge: draws cases, compares any backend with `unsloth_ref`, reports pass or fail and the error budget used.

Each package answers one question:

    specs, pieces   what is judged? one file for each operation and training piece
    properties      what must every operation satisfy?
    laws, models    what must a whole model satisfy, and how is it built and run?
    peers           how are other libraries called?
    learning        how is a spec found for an operation that has none?
    tolerances      how far may a result be from the truth?
    instruments     what does a call do while it runs?
    interpreter     what must Triton's interpreter do so that its results are those of a GPU?
    running         which checks are there, which cases do they draw, and where do they run?
    reporting       what is known of a failure, and what is printed and stored?
    bench           how fast is an operation?
    mutate          which faults would the judge miss?
    gate            may a change land?
    page            how are stored results shown?
    verbs           what does a command line ask for? one file for each verb

The modules beside them are shared by these packages: `spec`, `case`, `promises`, `calling`, `trial`, `property`,
`piece`, `profiles`, `counts`, `declarations`, `operations`, `backends` and `seams`; or they are entries: `cli`,
`testing` and `pytest_plugin`. `fingerprint` shows what Triton compiles. pyproject.toml states what may import what.
"""
