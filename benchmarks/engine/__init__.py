"""The measurements behind `benchmarks/engine.py`: one module per group, each adds its lines to a `Bench`.

`models`, `resident` and `peer_worker` import neither kvsieve nor its peer at the top, because both environments use
them.
"""
