"""Your agent. The service calls `create_agent` for every turn; everything else about it is yours to change."""

from agents import Agent
from chatkit.agents import AgentContext

from context import RequestContext


def create_agent(context: RequestContext) -> Agent[AgentContext[RequestContext]]:
    """Return the agent that answers this user; `context.user_id` and `context.locale` say who is asking."""
    return Agent(
        name="Assistant",
        instructions="You are a helpful assistant. Answer in the language of the question, in Markdown, briefly.",
    )
