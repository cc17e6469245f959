"""From a plan file to finished runs: `plan` → cells · `costs`: what they will take · `worker` drains them, however it was
started · `launchers` start workers · `progress`: what has become of each cell. The run folders are the only state.
"""
