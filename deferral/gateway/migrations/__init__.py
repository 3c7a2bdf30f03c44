"""From the tables of one version to those of the next, with Alembic's operations.

A step is a file of `versions` whose revision is the number of the version that it makes.  Which version a database has stands in
its table schema_version alone, which every version of the gateway reads before it touches anything else.
"""

import logging
from pathlib import Path

from sqlalchemy import Connection, update

from deferral.gateway.schema import version

__all__ = ["migrate"]

_log = logging.getLogger("deferral.gateway.database")


def migrate(connection: Connection, found: int, wanted: int) -> None:
    """Take the steps from version `found` to `wanted`, in the transaction of the connection: all of them or none."""
    # Only here: a gateway that finds its tables as they should be needs no Alembic in its memory.
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    here = Path(__file__).parent
    scripts = ScriptDirectory(str(here), version_locations=[str(here / "versions")])
    steps = list(scripts.iterate_revisions(str(wanted), str(found)))
    with Operations.context(MigrationContext.configure(connection)):
        for step in reversed(steps):
            _log.warning("the database goes to version %s: %s", step.revision, step.doc)
            step.module.upgrade()
            connection.execute(update(version).values(version=int(step.revision)))
