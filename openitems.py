"""The items that a turn has begun to show and not yet finished, as its client sees them now."""

import logging
from collections.abc import Iterator, Set
from datetime import UTC, datetime
from typing import Any, TypeVar

from agents.exceptions import ModelBehaviorError
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageContentPartAdded,
    AssistantMessageContentPartAnnotationAdded,
    AssistantMessageContentPartDone,
    AssistantMessageContentPartTextDelta,
    AssistantMessageItem,
    DurationSummary,
    GeneratedImageItem,
    GeneratedImageUpdated,
    ThreadItem,
    ThreadItemUpdate,
    WidgetComponentUpdated,
    WidgetItem,
    WidgetRootUpdated,
    WidgetStreamingTextValueDelta,
    WorkflowItem,
    WorkflowTaskAdded,
    WorkflowTaskUpdated,
)
from chatkit.widgets import WidgetComponentBase
from pydantic import BaseModel

from conversations import aware
from failures import log_failure
from rows import as_stored
from sdk import mended

log = logging.getLogger("service.turns")

T = TypeVar("T", bound=BaseModel)

MAX_PARTS = 1000
"""Of a message. A server that numbers them beyond that talks nonsense, and would have us make as many."""


class OpenItems:
    """Folds what a stream says of its items, in the order in which it named them first.

    (ChatKit 1.6.5 folds only messages and workflows, and forgets what is open when a turn fails.)

    What could not be stored, or not be read again, raises `ValueError` before it is shown, and changes nothing.
    """

    def __init__(self) -> None:
        self._items: dict[str, ThreadItem] = {}
        self._stored: dict[str, ThreadItem] = {}
        """Those that are items of the thread already, as they were."""
        self._unsaved: set[str] = set()
        self._placed: set[str] = set()
        self.withheld: set[str] = set()
        """The ids of those, finished ones too, that are about to be removed: none of them is to be stored again."""

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    def put(self, item: ThreadItem, *, stored: bool = False) -> None:
        """Open the item, or replace it as a whole; or open one that is `stored` already, to be changed."""
        self._items[item.id] = _copy(item, as_stored(item))
        self._unsaved.add(item.id)
        if stored:
            self._stored[item.id] = item

    def update(self, item_id: str, update: ThreadItemUpdate) -> None:
        """Apply an update to an open item; one that does not fit the item's kind changes nothing."""
        if not isinstance(update, AssistantMessageContentPartTextDelta | WidgetStreamingTextValueDelta):  # plain text
            read = type(update).model_validate_json(update.model_dump_json(by_alias=True, warnings=False))
            update = _copy(update, read)
        _apply(self._items[item_id], update)
        self._unsaved.add(item_id)

    def withhold(self, item_id: str) -> None:
        """Have an item that is about to be removed, from here and from the database, stored no more."""
        self.withheld.add(item_id)
        self._unsaved.discard(item_id)

    def discard(self, item_id: str) -> None:
        """Forget an item that is stored, or was removed."""
        self.withheld.discard(item_id)
        self._items.pop(item_id, None)
        self._stored.pop(item_id, None)
        self._unsaved.discard(item_id)

    @property
    def ids(self) -> Set[str]:
        return self._items.keys()

    @property
    def has_unsaved(self) -> bool:
        return bool(self._unsaved)

    @property
    def placed(self) -> Set[str]:
        """The ids of the items of which there was a checkpoint yet."""
        return self._placed

    def take_unsaved(self) -> list[ThreadItem]:
        """Return, for a checkpoint, what has changed since the last one."""
        return self._take([item for item in self._items.values() if item.id in self._unsaved])

    def give_back(self, items: list[ThreadItem]) -> None:
        """Count what was taken for a checkpoint as unsaved again, with no place yet: it could not be written."""
        self._unsaved.update(item.id for item in items if item.id in self._items)
        self._placed.difference_update(item.id for item in items)

    def take_unplaced_before(self, item_id: str) -> list[ThreadItem]:
        """Return, for a checkpoint, what was opened before this item and would otherwise be stored behind it."""
        if item_id not in self._items:
            return self._take([item for item in self._items.values() if item.id not in self._placed])
        earlier = []
        for item in self._items.values():
            if item.id == item_id:
                break
            earlier.append(item)
        return self._take([item for item in earlier if item.id not in self._placed])

    def _take(self, items: list[ThreadItem]) -> list[ThreadItem]:
        self._unsaved.difference_update(item.id for item in items)
        taken = [done for item in items if (done := _storable(item)) is not None]
        self._placed.update(item.id for item in taken)
        return taken

    def close(self) -> tuple[list[ThreadItem], list[str]]:
        """Return the open items as they are to be stored when the turn ends here, and the ids of those that are not.

        One that was stored before stays as it was where nothing could be stored of what became of it.
        """
        shown = [item for item in self._items.values() if item.id not in self.withheld]
        closed = [_storable(item) or self._stored.get(item.id) for item in shown]
        items = [item for item in closed if item is not None]
        stored = {item.id for item in items}
        known = [*self._items, *self.withheld - self._items.keys()]
        return items, [item_id for item_id in known if item_id not in stored]


def _copy(shown: T, read: T) -> T:
    """Return a copy, which the agent does not change any more, of what was read from its JSON.

    Of a template's widget the reading knows but a part.
    """
    has_widget = isinstance(shown, WidgetItem | WidgetRootUpdated | WidgetComponentUpdated)
    return shown.model_copy(deep=True) if has_widget else read


def _storable(item: ThreadItem) -> ThreadItem | None:
    """Return the item as `finished` does, or None where updates that could be stored made it one that cannot be."""
    try:
        done = finished(item)
        if done is not None:
            as_stored(done)
        return done
    except Exception as error:
        log_failure(log, f"what is open on thread {item.thread_id} could not be kept", error)
        return None


def finished(item: ThreadItem) -> ThreadItem | None:
    """Return a copy of the item in which nothing is under way any more, or None when it shows nothing."""
    item = item.model_copy(deep=True)
    match item:
        case AssistantMessageItem():
            for part in item.content:  # which came in pieces, cut anywhere
                part.text = mended(part.text)
            return item if any(part.text.strip() for part in item.content) else None
        case GeneratedImageItem():
            return item if item.image else None
        case WorkflowItem(workflow=workflow):
            for task in workflow.tasks:
                if task.status_indicator == "loading":
                    task.status_indicator = "none"
            if workflow.summary is None:
                seconds = (datetime.now(UTC) - aware(item.created_at)).total_seconds()
                workflow.summary = DurationSummary(duration=max(0, int(seconds)))
            return item if workflow.tasks else None
        case WidgetItem(widget=widget):
            for component in _components(widget):
                if getattr(component, "streaming", False):
                    component.streaming = False
                if isinstance(value := getattr(component, "value", None), str):
                    component.value = mended(value)
            return item
    return item


def _apply(item: ThreadItem, update: ThreadItemUpdate) -> None:
    match item, update:
        case AssistantMessageItem(), (
            AssistantMessageContentPartAdded()
            | AssistantMessageContentPartTextDelta()
            | AssistantMessageContentPartAnnotationAdded()
            | AssistantMessageContentPartDone()
        ):
            _apply_to_message(item, update)
        case WorkflowItem(workflow=workflow), WorkflowTaskAdded():
            workflow.tasks.insert(update.task_index, update.task)
        case WorkflowItem(workflow=workflow), WorkflowTaskUpdated():
            if update.task_index < len(workflow.tasks):
                workflow.tasks[update.task_index] = update.task
        case GeneratedImageItem(), GeneratedImageUpdated():
            item.image = update.image
        case WidgetItem(), WidgetRootUpdated():
            item.widget = update.widget
        case WidgetItem(), WidgetComponentUpdated():
            _replace_component(item.widget, update.component_id, update.component)
        case WidgetItem(), WidgetStreamingTextValueDelta():
            for component in _components(item.widget):
                if component.id == update.component_id:
                    component.value = component.value + update.delta
                    component.streaming = not update.done


def _apply_to_message(
    item: AssistantMessageItem,
    update: AssistantMessageContentPartAdded
    | AssistantMessageContentPartTextDelta
    | AssistantMessageContentPartAnnotationAdded
    | AssistantMessageContentPartDone,
) -> None:
    if not 0 <= update.content_index < MAX_PARTS:
        raise ModelBehaviorError(f"a part of a message has the number {update.content_index}")
    while len(item.content) <= update.content_index:  # a part may be spoken of before it was added
        item.content.append(AssistantMessageContent(text=""))
    match update:
        case AssistantMessageContentPartTextDelta():
            item.content[update.content_index].text += update.delta
        case AssistantMessageContentPartAnnotationAdded():
            item.content[update.content_index].annotations.insert(update.annotation_index, update.annotation)
        case _:
            item.content[update.content_index] = update.content


def _components(node: Any) -> Iterator[Any]:
    """Yield a widget's components, itself first; a `DynamicWidgetRoot` has fields that no class names."""
    if isinstance(node, WidgetComponentBase):
        yield node
        for _, value in node:
            yield from _components(value)
    elif isinstance(node, list):
        for value in node:
            yield from _components(value)


def _replace_component(root: Any, component_id: str, component: Any) -> None:
    for parent in [*_components(root)]:  # and not those that are put into it now
        for name, value in parent:
            if getattr(value, "id", None) == component_id:
                setattr(parent, name, component)
            elif isinstance(value, list):
                value[:] = [component if getattr(each, "id", None) == component_id else each for each in value]
