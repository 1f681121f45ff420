"""gRPC between the processes of a run: authenticated, with messages of limited size in msgpack.

``channel.py`` opens channels and servers, ``codec.py`` encodes and decodes messages, ``link.py`` is
a process's stream to the controller, ``keeper_messages.py`` defines the messages of keepers, and
``credentials.py`` loads the job's secret and certificate.
"""
