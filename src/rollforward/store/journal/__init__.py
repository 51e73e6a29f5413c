"""The journal: the redo log of rollouts and outcomes, one per rank. Format version 1.

    journal/rank_0/
    ├── 1-0_0.journal            incarnation 1, from step 0_0 on
    ├── 1-0_20.journal           ... from step 0_20 on: started after checkpoint 0_20 was
    ├── 2-0_20.journal           incarnation 2 resumed from checkpoint 0_20
    └── 1-0_20.journal.torn      what a crash left at the end of 1-0_20.journal

**Segments.** A segment is written by one incarnation of one rank, only grows, and is never reopened
for writing. Each start of the run begins a new one; so does the first step after a checkpoint was
started, and the first step after the segment has reached its size limit. A segment holds whole
steps: all of its incarnation's records from its first step up to the first step of the next segment,
so a folder's listing shows what is where.

**Frames.** `frames` describes how a record is framed, digested and numbered. Each frame is
fsynced before the next is written, and before `append` or `record` returns. Sequence numbers continue
across the segments of an incarnation, so a missing one is noticed. A frame that is not intact
is a torn write if it is the last of its incarnation: it is copied aside and cut off
(`reading.repair`). Otherwise it is damage: reported, never handed out, and nothing after it
in its segment is read.

**Records.** A frame's payload is a safetensors blob (`records`): once cut out of the file, any
safetensors tool can open it. Its metadata has `kind`, `position`, `time`, and

    kind        further metadata                arrays
    segment     segment: JSON, see below        -
    rollouts    chunk, and the caller's         the caller's
    outcome     iteration, and the caller's     the caller's; float64 of shape []
    event       event, detail: JSON             -

The first frame of every segment is a `segment` record: run id, rank, world size, incarnation,
fingerprint of the configuration, versions, device, the position where this incarnation started, and
`inherits`: [[incarnation, position], ...], the earlier records that belong to its history: those
of that incarnation before that position. Anything else is an abandoned future (`timeline`).

**Retention.** Once all of a segment's records in this history are from before the oldest kept
checkpoint, it is never needed again and may be removed.

Left out: compression (token ids and log-probabilities hardly shrink), encryption, and reading what
another process appends after the file was opened.
"""
