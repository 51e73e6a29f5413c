"""What a start of a run takes over: the newest intact checkpoint, and the redo log beyond it.

`recovery` loads the checkpoint. `inheriting` agrees with all ranks on what is replayed, `comparing` proves
that a replayed update repeats its record, and `report` says what was recovered and what that took: they serve
any run. What is in the records is said by `codec` and `rollout_log` for GRPO.
"""
