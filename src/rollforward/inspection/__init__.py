"""What the verbs show of a run, read from its folder: nothing here changes anything on disk.

Checks (`doctor`), listings (`folder`), every byte verified and two checkpoints compared (`looking`,
`checking`), the timeline (`history`), the rollouts of a step (`steps`, `rollouts`).
"""
