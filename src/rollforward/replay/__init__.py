"""What a start of a run takes over: the newest intact checkpoint, and the redo log beyond it.

`recovery` loads the checkpoint. `inheriting` agrees with all ranks on what is replayed, `comparing` proves
that a replayed update repeats its record, and `report` says what was recovered and how long that took: they
work for any run. For GRPO, `codec` and `rollout_log` define what is in the records.
"""
