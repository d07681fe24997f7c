"""The same conversation, shortened, with a real model: small, slow-witted, and nobody's stand-in."""

from pathlib import Path

from service import errors_of, eventually, fold, free_port, message, service, text_of, thread_of
from smallmodel import small_model


def test_a_real_model_answers_streams_is_stopped_and_asked_again(tmp_path: Path) -> None:
    with small_model(tmp_path / "model.log", free_port()) as url:
        environ = {
            "DATABASE_URL": f"sqlite:///{tmp_path}/chatkit.db",
            "OPENAI_BASE_URL": url,
            "OPENAI_API": "chat_completions",
            "OPENAI_DEFAULT_MODEL": "smollm2",
        }
        with service(**environ) as client:
            events = client.create("Say hello in one short sentence.")
            thread = thread_of(events)
            for text in ("Name a colour, in one word.", "And another one.", "What is two plus two?"):
                events += client.say(thread, text)
            assert not errors_of(events)
            deltas = [event for event in events if "text_delta" in event.get("update", {}).get("type", "")]
            assert len(deltas) > 10

            long = message("Write a very long story about a fox.")
            with client.streaming("threads.add_user_message", {"thread_id": thread, "input": long}) as stream:
                shown = ""
                while not shown.strip():  # its first word: however long the story is that the model has in mind
                    shown += next(stream).get("update", {}).get("delta", "")
            eventually(lambda: len(client.items(thread)) == 10)
            assert text_of(client.items(thread)[-1])

            short = client.items(thread)[6]
            assert text_of(short) == "What is two plus two?"
            again = client.stream("threads.retry_after_item", {"thread_id": thread, "item_id": short["id"]})
            assert not errors_of(again)
            assert client.items(thread)[-2:] == [short, *fold(again)]
            assert client.ask("threads.get_by_id", {"thread_id": thread})["title"]
