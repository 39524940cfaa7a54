"""What gRPC alone takes in Python: grpcio's asyncio server on uvloop, which reads our message and answers. Port: argv[1]."""

from __future__ import annotations

import sys

import grpc
import uvloop

from radloop.serving.predictor.messages import MESSAGES, SERVICE

answer = MESSAGES["ModelInferResponse"](model_name="default")
answer.raw_output_contents.append(bytes(8))


async def infer(request: object, context: object) -> object:
    """The same answer to all."""
    del context
    assert len(request.raw_input_contents) == 1
    return answer


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2**26)])
    handler = grpc.unary_unary_rpc_method_handler(
        infer, MESSAGES["ModelInferRequest"].FromString, MESSAGES["ModelInferResponse"].SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


uvloop.run(main())
