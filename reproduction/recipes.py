"""Every recipe by its name."""

from reproduction.ablations import FIG2, FIG3, FIG4, PROGRESSIVE
from reproduction.bounds import BOUNDS
from reproduction.directions import DIRECTIONS
from reproduction.geometry import FIG7
from reproduction.lengths import LENGTHS_RECIPE
from reproduction.lottery import LOTTERY
from reproduction.passes import FIG6, FRONTIER
from reproduction.patches import FIG5, IN_PATCH, PATCH_SIZES
from reproduction.recipe import Recipe
from reproduction.tables import TABLE2, TABLE6
from reproduction.text8_start import TEXT8_START
from reproduction.worded import WORDED

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        TABLE2,
        LENGTHS_RECIPE,
        TEXT8_START,
        BOUNDS,
        LOTTERY,
        FIG2,
        FIG3,
        FIG4,
        FIG5,
        FIG6,
        FIG7,
        TABLE6,
        FRONTIER,
        PROGRESSIVE,
        PATCH_SIZES,
        IN_PATCH,
        DIRECTIONS,
        WORDED,
    )
}
"""In the order in which `all` runs them."""
