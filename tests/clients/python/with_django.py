"""Django: default (client-side binding) | binding (server-side) | pool | persistent (CONN_MAX_AGE) | psycopg2"""

import os
import sys

import django
from django.conf import settings
from said import RUN, right, threads

HOW = sys.argv[1]
if HOW == "psycopg2":
    sys.modules["psycopg"] = None
OPTIONS = {"binding": {"server_side_binding": True}, "pool": {"pool": {"min_size": 2, "max_size": 4}}}
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": os.environ["PGDATABASE"],
            "USER": os.environ["PGUSER"],
            "PASSWORD": os.environ["PGPASSWORD"],
            "HOST": os.environ["PGHOST"],
            "PORT": os.environ["PGPORT"],
            "CONN_MAX_AGE": None if HOW == "persistent" else 0,
            "CONN_HEALTH_CHECKS": HOW == "persistent",
            "OPTIONS": OPTIONS.get(HOW, {}),
        }
    }
)
django.setup()

from django.db import close_old_connections, connection, models, transaction  # noqa: E402


class Written(models.Model):
    run = models.IntegerField()
    id = models.BigIntegerField(primary_key=True)
    note = models.TextField(null=True)

    class Meta:
        app_label = "clients"
        db_table = "written"


def body(worker):
    mine = Written.objects.filter(run=RUN)

    def request(op):
        """As a request does: health checks and CONN_MAX_AGE belong to its begin and end."""

        def whole():
            close_old_connections()
            try:
                op()
            finally:
                close_old_connections()

        whole.__name__ = op.__name__
        return whole

    def create():
        id = worker.id()
        Written.objects.create(run=RUN, id=id, note="x")
        right(mine.filter(id=id).count(), 1)

    def atomic():
        with transaction.atomic():
            Written.objects.create(run=RUN, id=worker.id())
            with transaction.atomic():
                Written.objects.create(run=RUN, id=worker.id())

    def bulk():
        Written.objects.bulk_create([Written(run=RUN, id=worker.id()) for _ in range(3)])

    def iterator():
        ids = {it.id for it in mine.order_by("-id")[:20].iterator(chunk_size=5)}
        right(len(ids) > 0, True)

    def iterator_in_transaction():
        with transaction.atomic():
            right(sum(1 for _ in mine[:20].iterator(chunk_size=5)) > 0, True)
            Written.objects.create(run=RUN, id=worker.id())

    def update():
        id = worker.id()
        Written.objects.create(run=RUN, id=id, note="x")
        right(mine.filter(id=id).update(note="y"), 1)
        right(mine.get(id=id).note, "y")

    def after():
        connection.close_if_unusable_or_obsolete()

    ops = [create, atomic, bulk, iterator, iterator_in_transaction, update]
    return [request(op) for op in ops], after


threads(body)
