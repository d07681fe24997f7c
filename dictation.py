"""Dictation: from what somebody said to what they would have typed. Nothing of it is stored."""

import base64
import binascii

import openai
from agents.exceptions import ModelBehaviorError
from chatkit.types import InputTranscribeParams, TranscriptionResult
from openai import AsyncOpenAI

from conversations import QuotaExceeded
from failures import Refused
from sdk import mended

MAX_AUDIO_BYTES = 25 * 1024 * 1024
"""As OpenAI's audio API has it."""
MAX_AT_ONCE = 32
"""In a process: they share its connections to the model's server with the turns."""
AUDIO_TYPES = {"audio/webm": "webm", "audio/ogg": "ogg", "audio/mp4": "mp4"}
"""What the ChatKit panel records, and the file names that the audio API knows them by."""


class DictationFailed(Exception):
    """The model behind the audio API failed; its cause says how."""


class Dictation:
    """Transcribes with one model of OpenAI's audio API, or of a compatible server's."""

    def __init__(self, client: AsyncOpenAI, model: str):
        self._client = client
        self._model = model
        self._heard: set[str] = set()

    async def transcribe(self, params: InputTranscribeParams, user_id: str) -> TranscriptionResult:
        """Transcribe for the user, who has one dictation at a time.

        Raises `QuotaExceeded`, `Refused` for what is no audio of a known type, `DictationFailed` where the model fails.
        """
        if user_id in self._heard:
            raise QuotaExceeded("dictations", retry_after_seconds=5)
        if len(self._heard) >= MAX_AT_ONCE:
            raise QuotaExceeded("max_turns", retry_after_seconds=5)
        self._heard.add(user_id)
        try:
            return await self._transcribe(params)
        finally:
            self._heard.remove(user_id)

    async def _transcribe(self, params: InputTranscribeParams) -> TranscriptionResult:
        media_type = params.mime_type.partition(";")[0].strip().lower()
        if media_type not in AUDIO_TYPES:
            raise Refused("unsupported_type", f"Dictation takes {', '.join(AUDIO_TYPES)}.")
        try:
            data = base64.b64decode(params.audio_base64, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("bad_params", "params.audio_base64 is not base64.") from None
        if not data:
            raise Refused("bad_params", "The recording is empty.")
        if len(data) > MAX_AUDIO_BYTES:
            raise Refused("too_large", f"The recording is longer than {MAX_AUDIO_BYTES} bytes.")
        try:
            heard = await self._client.audio.transcriptions.create(
                model=self._model, file=(f"speech.{AUDIO_TYPES[media_type]}", data, media_type)
            )
        except openai.OpenAIError as error:
            raise DictationFailed from error
        except ValueError:  # openai 3.54, of an answer that is not JSON
            raise DictationFailed from ModelBehaviorError("the answer is not JSON")
        text = getattr(heard, "text", None)
        if not isinstance(text, str):  # of other answers it makes whatever it can
            raise DictationFailed from ModelBehaviorError("the answer has no text")
        return TranscriptionResult(text=mended(text))
