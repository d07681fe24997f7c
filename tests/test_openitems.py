"""Where the items of a turn have their places, also when the database does not answer."""

from chatkit.types import AssistantMessageContent, AssistantMessageItem

from openitems import OpenItems
from test_store import NOON


def message(item_id: str) -> AssistantMessageItem:
    content = [AssistantMessageContent(text="Some words")]
    return AssistantMessageItem(id=item_id, thread_id="thr_1", created_at=NOON, content=content)


def test_an_item_whose_checkpoint_failed_has_no_place_yet() -> None:
    items = OpenItems()
    items.put(message("first"))
    assert [item.id for item in items.take_unsaved()] == ["first"]
    items.put(message("second"))
    assert items.take_unplaced_before("second") == []
    items.give_back([message("first")])
    assert [item.id for item in items.take_unplaced_before("second")] == ["first"]
