"""`tost recipes`: those that come with the library, and what a recipe may hold."""

from __future__ import annotations

import typer

from tost_plugins.lab.cli.arguments import JsonOption, RecipeArg, SetOption, recipe_of, show

app = typer.Typer(help="The recipes that come with the library.", no_args_is_help=True)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Every shipped recipe: its name, mask, model, data and length."""
    from tost_plugins.lab.report import table
    from tost_plugins.recipe.recipe import Recipe, shipped

    recipes = [Recipe.load(name) for name in shipped()]
    rows = [{"name": r.name, "mask": f"{r.mask.kind} {getattr(r.mask, 'sparsity', None) or ''}".strip(),
             "model": r.model, "data": r.data.name, "duration": str(r.duration)} for r in recipes]  # fmt: skip
    show(as_json, rows, table("recipes", rows))


@app.command("show")
def show_one(recipe: RecipeArg, set_: SetOption = [], as_json: JsonOption = False) -> None:
    """Print a recipe with every default filled in."""
    found = recipe_of(recipe, set_)
    if as_json:
        return show(True, found.to_dict())
    print(found.to_yaml(), end="")


@app.command("schema")
def schema(as_json: JsonOption = False) -> None:
    """Print the JSON schema of recipes, for editors to complete from."""
    from tost_plugins.recipe.recipe import Recipe

    show(True, Recipe.model_json_schema())
