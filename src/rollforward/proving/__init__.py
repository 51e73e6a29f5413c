"""`rollforward prove`: a trainer is killed and started again, and compared with a run in peace.

    starting     one start of the command: its output kept, killed at a moment or after a line
    moments      random moments for kills
    trial        a run of the command in a folder of its own, with all its starts
    leavings     what a run left in its folder: the newest checkpoint, the series of steps
    tensors      the tensors of checkpoints of any trainer, compared
    series       what a trainer logged, step by step, and where two runs part
    fields       what a field of a log is about, from its name
    comparing    both, beyond what two undisturbed runs differ in
    causes       from where two runs part to what was not restored
    prove        all of it; proof, notes and report: what was found, for programs and for people

Nothing here knows the trainer: it is a command that writes into a folder.
"""
