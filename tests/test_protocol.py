"""The sixteen operations of the protocol, over HTTP: what a client is told, and what is then stored."""

from service import Client, fold, text_of, thread_of, types
from standin import Say, StandIn


def test_a_new_thread_is_announced_answered_and_stored(client: Client, model: StandIn) -> None:
    model.will(Say("Good morning to you."))
    events = client.create("Good morning")
    assert types(events) == [
        "thread.created",
        "thread.item.done[user_message]",
        "stream_options",
        "thread.item.added[assistant_message]",
        "thread.item.updated[assistant_message.content_part.added]",
        "thread.item.updated[assistant_message.content_part.text_delta]",
        "thread.item.updated[assistant_message.content_part.done]",
        "thread.item.done[assistant_message]",
    ]
    stored = client.items(thread_of(events))
    assert [text_of(item) for item in stored] == ["Good morning", "Good morning to you."]
    assert stored == fold(events)
