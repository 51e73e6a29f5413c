"""The journal: the redo log of rollouts and outcomes, one for each rank. Format version 1.

    journal/rank_0/
    ├── 1-0_0.journal            incarnation 1, from step 0_0 on
    ├── 1-0_20.journal           ... from step 0_20 on: begun after checkpoint 0_20 was
    ├── 2-0_20.journal           incarnation 2 went on from checkpoint 0_20
    └── 1-0_20.journal.torn      what a crash left at the end of 1-0_20.journal

**Segments.** A segment is written by one incarnation of one rank, grows at its end and is never
opened for writing again. Each start of the run begins one; so do the first step after a checkpoint
was begun, and the first step after the segment has reached its size bound. A segment holds whole
steps: all of its incarnation's records from its first step up to the first step of the next one,
so a folder's listing tells what is where.

**Frames.** `frames` says how a record is framed, digested and numbered. Each frame is
fsynced before the next is written, and before `append` or `record` returns. Sequence numbers run on
over the segments of an incarnation, so one that is missing is noticed. A frame that is not
intact is a torn write when it is the last of its incarnation: it is copied aside and cut
(`reading.repair`). Otherwise it is damage: reported, never handed out, and nothing behind it
in its segment is read.

**Records.** A frame's payload is a safetensors blob (`records`): cut out of the file, any
tool opens it. Its metadata says `kind`, `position`, `time`, and

    kind        further metadata                arrays
    segment     segment: JSON, see below        -
    rollouts    chunk, and the caller's         the caller's
    outcome     iteration, and the caller's     the caller's; float64 of shape []
    event       event, detail: JSON             -

The first frame of every segment is a `segment` record: run id, rank, world size, incarnation,
fingerprint of the configuration, versions, device, the position where this incarnation started, and
`inherits`: [[incarnation, position], ...], the earlier records that belong to its history: those
of that incarnation before that position. Anything else is a future that was abandoned (`timeline`).

**Retention.** A segment whose records of this history are all of positions before the oldest kept
checkpoint is never needed again, and may be removed.

Left out: compression (token ids and log-probabilities hardly shrink), encryption, and reading while
another process writes beyond what was there when the file was opened.
"""
