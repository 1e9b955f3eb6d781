"""Recipes: their schema, reading their files, and the shipped recipes. Nothing here touches data."""
