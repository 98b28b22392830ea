"""Imported by the process that workers are forked from, last of all and there alone: a thread would not be safe to fork
beside."""

from dist_train.data import server

server.imported.set()
server.thread.join()
