"""gRPC between the processes of a run: authenticated, bounded, msgpack of frozen classes.

``channel.py`` opens channels and servers, ``codec.py`` reads and writes messages, ``link.py`` is a
process's stream to the controller, ``keeper_messages.py`` what keepers are told.
"""
