"""Every function of the package runs under beartype, with jaxtyping checking the shapes that its signature states."""

from __future__ import annotations

from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typechecker

install_import_hook("persona_rlhf", f"{tests.typechecker.__name__}.checked")

settings.register_profile("any machine", deadline=None)  # a slow machine is no failure; pytest's own limit stands
settings.load_profile("any machine")
