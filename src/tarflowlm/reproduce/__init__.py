"""The paper's tables and figures as recipes: trainings, measurements and written results."""

from tarflowlm.reproduce.ablations import FIG2, FIG3, FIG4, FIG5, ONE_BLOCK, PATCH_SIZES, PROGRESSIVE
from tarflowlm.reproduce.passes import FIG6, FRONTIER
from tarflowlm.reproduce.recipe import Recipe
from tarflowlm.reproduce.states import FIG7
from tarflowlm.reproduce.tables import TABLE2, TABLE6

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (TABLE2, FIG2, FIG3, FIG4, FIG5, FIG6, FIG7, TABLE6, PROGRESSIVE, PATCH_SIZES, ONE_BLOCK, FRONTIER)
}
"""Every recipe by its name, in the order in which `all` runs them."""

__all__ = ["RECIPES"]
