"""Training data: readers of the usual formats, chats as messages, chats as token ids, and conversations made by the target."""
