"""What alignment optimises: one file for each objective; the union is the registry."""

from typing import Annotated

from pydantic import Field

from align.objectives.dpo import Dpo
from align.objectives.rwr import Rwr

Objective = Annotated[Dpo | Rwr, Field(discriminator="kind")]
