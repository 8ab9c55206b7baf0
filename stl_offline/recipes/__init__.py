"""Recipes: training settings as YAML files, which lie in this folder."""

from stl_offline.recipes.reading import read_recipe, recipe_names, resolve

__all__ = ["read_recipe", "recipe_names", "resolve"]
