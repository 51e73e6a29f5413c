"""What a start of a run takes over: the newest intact checkpoint, and the redo log beyond it.

`recovery` loads the checkpoint, `rollout_log` agrees with all ranks on what is replayed, `codec` packs
chunks of rollouts into journal records, and `report` says what was recovered and what that took.
"""
