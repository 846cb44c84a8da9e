"""Migrations: the way of the tables from one version to the next, for Alembic.

Each one is additive, so that workers and clients of the version before go on working while a deploy
rolls through: add nullable columns or columns with a default, add tables and indexes; never rename or drop.
"""
