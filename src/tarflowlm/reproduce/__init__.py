"""The paper's tables and figures as recipes: trainings, measurements and written results."""

from tarflowlm.reproduce import ablations
from tarflowlm.reproduce.ablations import FIG2, FIG3, FIG4, FIG5
from tarflowlm.reproduce.passes import FIG6, FRONTIER
from tarflowlm.reproduce.recipe import Recipe
from tarflowlm.reproduce.states import FIG7
from tarflowlm.reproduce.tables import TABLE2, TABLE6

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        TABLE2,
        FIG2,
        FIG3,
        FIG4,
        FIG5,
        FIG6,
        FIG7,
        TABLE6,
        FRONTIER,
        ablations.PROGRESSIVE,
        ablations.PATCH_SIZES,
        ablations.IN_PATCH,
        ablations.SHARES,
    )
}
"""Every recipe by its name, in the order in which `all` runs them."""
