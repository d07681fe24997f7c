"""Where the items of a turn have their places, also when the database does not answer."""

import logging

import pytest
from chatkit.actions import ActionConfig
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    CustomTask,
    WidgetComponentUpdated,
    WidgetItem,
    WidgetRootUpdated,
    WidgetStreamingTextValueDelta,
    Workflow,
    WorkflowItem,
    WorkflowTaskUpdated,
)
from chatkit.widgets import (
    BarSeries,
    Box,
    Button,
    Card,
    Chart,
    DynamicWidgetComponent,
    DynamicWidgetRoot,
    Text,
)

from openitems import OpenItems
from rows import item_row, read_item
from sdk import encode
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


NOVEL_WIDGET = {
    "type": "Card",
    "novel": 1,
    "children": [{"type": "Title", "id": "t", "value": "T"}, {"type": "New", "id": "n", "odd": "x"}],
}


def widget(item_id: str, root: Card | DynamicWidgetRoot) -> WidgetItem:
    return WidgetItem(id=item_id, thread_id="thr_1", created_at=NOON, widget=root)


def test_an_item_that_became_too_deep_to_be_stored_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    items = OpenItems()
    items.put(message("first"))
    items.put(widget("deep", Card(children=[Box(id="0", children=[])])))
    items.put(message("last"))
    for level in range(120):
        inner = Box(id=str(level + 1), children=[])
        items.update("deep", WidgetComponentUpdated(component_id=str(level), component=Box(children=[inner])))
    with caplog.at_level(logging.ERROR):
        assert [item.id for item in items.take_unsaved()] == ["first", "last"]
    assert "could not be kept" in caplog.text
    stored, unstored = items.close()
    assert ([item.id for item in stored], unstored) == (["first", "last"], ["deep"])


@pytest.mark.parametrize("updated", [False, True])
def test_a_widget_keeps_what_no_class_of_the_sdk_names(updated: bool) -> None:
    shown = DynamicWidgetRoot.model_validate(
        {
            "type": "Card",
            "novel": 1,
            "children": [{"type": "Title", "id": "t", "value": "T"}, {"type": "New", "id": "n", "odd": "x"}],
        }
    )
    items = OpenItems()
    items.put(widget("w", Card(children=[]) if updated else shown))
    if updated:
        items.update("w", WidgetRootUpdated(widget=shown))
    [kept], _ = items.close()
    assert isinstance(kept, WidgetItem)
    assert kept.widget.model_dump() == shown.model_dump()
    assert encode(read_item(item_row("thr_1", kept)["body"])) == encode(kept)
    assert isinstance(kept.widget, DynamicWidgetRoot)
    assert isinstance(kept.widget.children, list)
    assert isinstance(kept.widget.children[1], DynamicWidgetComponent)


def test_what_is_no_component_of_a_widget_stays_as_it_is() -> None:
    action = ActionConfig(type="order")
    series = [BarSeries(dataKey="n", label="N")]
    chart = Chart(data=[{"n": 1}], series=series, xAxis="n")
    items = OpenItems()
    text = Text(id="t", value="", streaming=True)
    items.put(widget("w", Card(children=[text, Button(label="Order", onClickAction=action), chart])))
    items.update("w", WidgetStreamingTextValueDelta(component_id="t", delta="Words", done=False))
    [kept], _ = items.close()
    assert isinstance(kept, WidgetItem)
    assert isinstance(kept.widget, Card)
    shown, button, bars = kept.widget.children
    assert isinstance(shown, Text)
    assert isinstance(button, Button)
    assert (shown.value, shown.streaming) == ("Words", False)
    assert button.onClickAction == action
    assert bars == chart


def test_a_component_may_be_put_into_one_that_takes_its_place() -> None:
    items = OpenItems()
    items.put(widget("w", Card(children=[Text(id="t", value="V")])))
    around = Box(children=[Text(id="t", value="V")])
    items.update("w", WidgetComponentUpdated(component_id="t", component=around))
    [kept], unstored = items.close()
    assert isinstance(kept, WidgetItem)
    assert isinstance(kept.widget, Card)
    assert (kept.widget.children, unstored) == ([around], [])


def test_what_an_agent_does_to_an_object_after_it_was_shown_changes_nothing() -> None:
    items, before, task = OpenItems(), CustomTask(title="Before"), CustomTask(title="Shown")
    workflow = Workflow(type="custom", tasks=[before])
    items.put(WorkflowItem(id="w", thread_id="thr_1", created_at=NOON, workflow=workflow))
    items.update("w", WorkflowTaskUpdated(task_index=0, task=task))
    task.title = before.title = "Changed"
    [kept], _ = items.close()
    assert isinstance(kept, WorkflowItem)
    assert [each.title for each in kept.workflow.tasks if isinstance(each, CustomTask)] == ["Shown"]
