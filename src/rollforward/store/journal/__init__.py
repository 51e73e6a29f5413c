"""The journal: the redo log of rollouts and outcomes, one per rank. Format version 3.

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

**Frames.** `frames` describes how a record is framed, digested and numbered. Sequence numbers continue
across the segments of an incarnation, so a missing one is noticed. A frame that is not intact
is a torn write if it need not have been durable when what follows it was written: it is copied aside and cut
off with all that follows (`upkeep.repair`). Otherwise it is damage: reported, never handed out, and nothing
after it in its segment is read.

**Durability.** Rollouts and events are fsynced before the call that writes them returns. An outcome is only
written: it is fsynced together with the next record that is not an outcome of its step, before its segment is
left, before a checkpoint begins, and at the end. So a step costs one sync. Nothing is lost by that: a process
that dies leaves the outcome to the system, and if the machine crashes too, a step whose rollouts are there
and whose outcome is not is computed again from them and recorded; only the comparison is missing then.
Nothing can come to depend on an outcome that a crash takes: the rollouts of the next step are behind it in
the same file, and become durable with it or not at all. On several ranks one may have the outcome and another
not: it counts for all, and who lacks it records it again. What a start finds and takes over may be in the
system's memory only, left by a process that was killed; it is fsynced before it is used (`upkeep.settle`).

**Records.** A frame's payload is a safetensors blob (`records`): once cut out of the file, any
safetensors tool can open it. Its metadata has `kind`, `position`, `time`, and

    kind        further metadata                arrays
    segment     segment: JSON, see below        -
    rollouts    chunk, and the caller's         the caller's
    outcome     iteration, and the caller's     the caller's; float64 of shape []
    event       event, detail: JSON             -

The first frame of every segment is a `segment` record: format version, run id, rank, world size, incarnation,
fingerprint of the configuration, versions, device, chunks of a step, the position where this incarnation
started, and `inherits`: [[incarnation, position], ...], the earlier records that belong to its history: those
of that incarnation before that position. Anything else is an abandoned future (`timeline`).

**Ranks.** `chunk` is the number in the step, over all ranks, so a record counts for every rank, and a run
goes on with another number of them. Until version 2 each frame was fsynced before the next was written.
Version 1 had no number of its version, and each rank numbered its own chunks; `reading` gives them their
numbers in the step. A loop of one's own (`open_run`) has no chunks of a
step: there, each process numbers what it made, and a record counts for that process only.

**Retention.** Once all of a segment's records in this history are from before the oldest kept
checkpoint, it is never needed again and may be removed.

Left out: compression (token ids and log-probabilities hardly shrink), encryption, and reading what
another process appends after the file was opened.
"""
