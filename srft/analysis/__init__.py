"""What training changed in a model, token by token: `srft analyze`.

    main_analyze(base, runs, overrides, directory)

What models say of a token is computed by the fused head from their hidden states (N, H): nothing of size N·V is made.
"""

from srft.analysis.analyze import main_analyze

__all__ = ["main_analyze"]
