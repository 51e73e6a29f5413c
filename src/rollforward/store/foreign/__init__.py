"""Folders and files of other trainers: reading them, living beside them, and writing as they do.

    mindrlhf            which files a folder of MindRLHF or MindFormers has, and the newest step that is whole
    mindformers_names   their names of tensors, in both directions
    files               tensors of one file, `.safetensors` or `.ckpt`
    ckptfile, protobuf  MindSpore's own format
    strategy_files, joining   tensors that were split over ranks, put together
    guests              their files in a folder that became ours
    exporting           a checkpoint of ours in their layout

Nothing here has digests to check, except where a file has a CRC: what is read is what the file says.
"""
