"""Sweeps and studies: many runs from one TOML file, trained by any number of workers on one or many machines.

    sweep_file   a sweep file → its cells, one configuration each       costs      operations, time, memory and disk of cells
    manifest     a sweep's record beside its runs, to join it           slots      where runs can be put on this machine
    worker       trains cells until none is free                        outcomes   what has become of each cell
    launchers    start workers: here, with SLURM, with Ray              study      a sweep that compares schemes

The run folders are the only state: nothing else says what is done.
"""
