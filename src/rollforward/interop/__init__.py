"""Folders and files of other trainers: reading them, resuming from them, and writing as they do.

    folders             which files a folder of MindRLHF or MindFormers has, and its newest complete step
    names               their names of tensors, in both directions
    files               the tensors of one file, `.safetensors` or `.ckpt`
    ckptfile, protobuf  MindSpore's own format
    strategies, joining tensors that were split over ranks, put together
    resuming            what a run resumes from, decided from headers alone
    mapping             their tensors matched with a model's, every one accounted for
    restoring           one worker's part of it: read, agree, put in place
    exporting           a checkpoint of ours in their layout

Files of theirs that lie in a folder which became ours are `store.guests`. Nothing here has digests to
check, except where a file has a CRC: what is read is what the file says.
"""
