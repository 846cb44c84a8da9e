"""Migrations: the steps that take the tables from one version to the next, for Alembic.

Each one is additive, so that workers and clients of the version before keep working during a rolling deploy: add
nullable columns, columns with a default, tables and indexes; never rename or drop.  Every table and index is named
after ``keepstream_…``, because the schema may be a host application's as well.
"""
