"""Folders and files of other trainers: reading them, resuming from them, writing their layout.

    folders             which files a folder of MindRLHF or MindFormers has, and its newest complete step
    names               their tensor names and ours, in both directions
    files               the tensors of one file, `.safetensors` or `.ckpt`
    ckptfile, protobuf  MindSpore's own format
    strategies, joining tensors that were split over ranks, reassembled
    resuming            what a run resumes from, decided from headers alone
    mapping             their tensors matched with a model's, every one accounted for
    restoring           one worker's part of it: read, agree, load
    exporting           one of our checkpoints in their layout

Another trainer's files in a folder that we now write to are the subject of `store.guests`. There are no
digests to check here, only a CRC in some files: what the file says is taken as it is.
"""
