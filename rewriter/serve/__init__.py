"""An OpenAI-compatible server over an exported folder, without torch: `rewriter serve FOLDER`.

`text.py` turns messages into tokens and tokens into text; `engine.py` runs the model, in one
thread; `protocol.py` says what a request may hold; `app.py` is the ASGI application; `server.py`
listens.
"""
