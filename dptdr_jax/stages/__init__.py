"""The stages of a run: one file each, one function (config, workdir) each, files in and files out."""
