"""Writes docs/families.md from the table that tests/test_families.py checks.

Usage, from the repository's root: python -m tools.families_page
"""

from __future__ import annotations

from pathlib import Path

import transformers

from tests.family_table import FAMILIES, Family

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

_HEAD = """# Families

Every family of transformers with routed experts, and what esft makes of it. Written by
`python -m tools.families_page` with transformers {version}; do not edit. `tests/test_families.py`
takes each family, as a tiny random model, through profile, select, three steps of training, delta,
merge and a reload by plain transformers, checks scores, weights and logits, and fails when the
installed transformers has a family that is not in this table.

- **on disk**: whether a checkpoint has a tensor for each expert, or one for all (`fused`), as
  transformers saves it.
- **router**: how it makes weights of logits; [families-gates.md](families-gates.md) says what the
  gate value is.
  "Normalised" is, in many families, up to the configuration (`norm_topk_prob`).
- **losses**: whether those of routers work ([losses.md](losses.md)); `+ bias` where routers choose
  with a bias that `bias_update` can move.
- **packed rows**: `no` where transformers does not keep packed rows apart; set
  `data.packing: false`, which `esft train` asks for by itself.

| model_type | on disk | router | shared experts | profile to merge | losses | packed rows |
|---|---|---|---|---|---|---|
"""


def render(version: str) -> str:
    """Return the page's text, as generated with a version of transformers."""
    lines = [_line(name, family) for name, family in sorted(FAMILIES.items())]
    covered = sum(family.refused is None for family in FAMILIES.values())
    count = (
        f"\n{covered} of {len(FAMILIES)} families are covered; the others are refused by name.\n"
    )
    return _HEAD.format(version=version) + "\n".join(lines) + "\n" + count


def _line(name: str, family: Family) -> str:
    if family.refused is None:
        needs = f"transformers {family.since} or later" if family.since else ""
        status = "; ".join(filter(None, ["yes", needs, family.note]))
        packs = "yes" if family.packs else "no"
        shared = "yes" if family.shared else "no"
        losses = "yes + bias" if family.biased else "yes"
    else:
        status, packs, shared, losses = f"**refused**: {family.refused}", "–", "–", "–"
    cells = (f"`{name}`", family.disk, family.scoring, shared, status, losses, packs)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(render(transformers.__version__), encoding="utf-8")
