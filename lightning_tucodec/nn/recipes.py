"""Names of losses, which need no PyTorch."""


def recipe_name(recipe: str) -> str:
    """A recipe's name today: cards and configurations of earlier versions call `mse` `transparent`."""
    return "mse" if recipe == "transparent" else recipe
