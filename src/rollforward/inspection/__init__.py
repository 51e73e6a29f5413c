"""What the verbs show about a run, read from its folder: nothing here changes anything on disk.

Checks (`doctor`), listings (`folder`), every byte verified (`verifying`), two checkpoints compared
(`comparing`), the timeline (`history`), the rollouts of a step (`steps`, `rollouts`).
"""
