// How an op becomes a node of PyTorch's graph: autograd.h.

#include "autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

namespace pytorch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::CppNode;
using torch::autograd::Node;
using torch::autograd::variable_list;
using NodePointer = decltype(torch::autograd::get_current_node());  // std::shared_ptr in older versions

constexpr char SECOND_ORDER[] =
    "pytorch_ext: the kernels have no second derivative; for one, run the forward pass under"
    " pytorch_ext.backends.use('native')";
constexpr char DATA[] = "formula, constants";

template <class N>
NodePointer make_node() {
    if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>)
        return NodePointer(new N, [](auto* node) { deleteNode(node); });
    else
        return c10::make_intrusive<N>();
}

// Makes `results` of whatever they were made from, by an error for who differentiates them. torch.autograd.grad visits
// only what leads to its inputs: with less than all of it a second derivative could lack a part, in silence.
void refuse_second_order(Tensors& results, const Tensors& gradients) {
    const NodePointer node = torch::autograd::get_current_node();
    if (!node) return;  // compiled, and then nothing is differentiated once more
    auto edges = torch::autograd::collect_next_edges(gradients);
    edges.insert(edges.end(), node->next_edges().begin(), node->next_edges().end());
    struct Refusal : torch::autograd::Error {
        Refusal() : Error(SECOND_ORDER) {}
    };
    const NodePointer refusal = make_node<Refusal>();
    refusal->set_next_edges(std::move(edges));
    for (Tensor& result : results) {
        if (!result.defined()) continue;
        result = result.detach();  // one tensor may be the gradient of two inputs
        torch::autograd::impl::set_gradient_edge(result, {refusal, refusal->add_input_metadata(result)});
    }
}

// What CppNode asks for: the backward of every op, which its context names.
struct AnyOp {
    static constexpr bool is_traceable = false;

    static variable_list backward(AutogradContext* context, variable_list& gradients) {
        const auto data = context->saved_data.at(DATA).toTuple();
        const auto elements = data->elements().asArrayRef();
        const auto& formula = *reinterpret_cast<const Formula*>(elements[0].toInt());
        const Backward node{context->get_saved_variables(), gradients,
                            Constants(elements.begin() + 1, elements.end()),
                            [&](size_t input) { return context->needs_input_grad(input); }};
        Tensors results = below_autograd([&] { return formula.backward(node); });
        if (at::GradMode::is_enabled()) refuse_second_order(results, gradients);
        return results;
    }
};

struct OpNode : CppNode<AnyOp> {
    const char* own_name = "";

    std::string name() const override { return own_name; }
};

}  // namespace

void record(const Formula& formula, const Tensors& inputs, const Tensors& outputs, Tensors saved,
            Constants constants) {
    const NodePointer pointer = make_node<OpNode>();
    auto& node = static_cast<OpNode&>(*pointer);
    node.own_name = formula.name;
    node.set_ctx_grad_fn(pointer);
    node.set_next_edges(torch::autograd::collect_next_edges(inputs));
    node.is_variable_input_.assign(inputs.size(), true);
    for (const Tensor& out : outputs) {
        torch::autograd::impl::set_gradient_edge(out, {pointer, node.add_input_metadata(out)});
        node.output_info_.emplace_back(out);
    }
    node.ctx_.set_materialize_grads(!formula.takes_undefined);
    constants.insert(constants.begin(), reinterpret_cast<int64_t>(&formula));
    node.ctx_.saved_data[DATA] = c10::ivalue::Tuple::create(std::move(constants));
    node.ctx_.save_for_backward(std::move(saved));
    node.save_variables_to_ctx();
}

}  // namespace pytorch_ext
