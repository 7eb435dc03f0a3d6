"""Processes of a benchmark that the system kills. Imports nothing heavy: a child imports this file alone."""

import os


def at_once(connection, *arguments):
    os._exit(9)


def when_asked(connection, *arguments):
    connection.send(0.0)
    connection.recv()
    os._exit(9)


def between_turns(connection, *arguments):
    connection.send(0.0)
    os._exit(9)
