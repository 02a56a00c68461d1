"""Every function of the package runs under beartype, with jaxtyping checking the shapes that its signature states."""

from __future__ import annotations

from jaxtyping import install_import_hook

import tests.typechecker

install_import_hook("persona_rlhf", f"{tests.typechecker.__name__}.checked")
