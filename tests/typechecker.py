"""beartype as the import hook of conftest.py wants it: an int may stand where a float is asked for (PEP 484)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
