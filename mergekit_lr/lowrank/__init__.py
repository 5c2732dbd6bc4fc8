"""Low-rank task models: adapters as pairs of factors, their merges in factor space, and packing many into few.

A pair is ``(B, A)``, ``B [out, r]`` and ``A [r, in]`` in PEFT's orientation; the change of the weight is ``scale B A``.
"""
