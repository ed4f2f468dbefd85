import torch
def test_a(tiny_decoder, tiny_encoder, tokenizer, bert_tokenizer, make_slate):
    for b in (tiny_decoder, tiny_encoder):
        ids=torch.tensor([[5,6,7]]); T=3
        m=torch.zeros(1,1,3,3); 
        if b.is_decoder: m=m+torch.triu(torch.full((3,3),torch.finfo(m.dtype).min),1)
        h=b.hidden_states(ids,m,torch.arange(3)[None])
        assert h.shape==(1,3,32)
        print(b.identity, b.layers, None if b.lm_head is None else b.lm_head.shape)
    print(make_slate(features=("pop",)))
    for s in ("Hello wörld 日本 velvet\n","<|im_start|>user\nx<|im_end|>"):
        ids=tokenizer(s,add_special_tokens=False).input_ids; print(ids, repr(tokenizer.decode(ids)), tokenizer.pad_token_id,len(tokenizer))
        assert tokenizer.decode(ids)==s
    print(tokenizer.apply_chat_template([{"role":"user","content":"hi"}],tokenize=False,add_generation_prompt=True))
    print(bert_tokenizer.tokenize("Hello velvet WORLD 日"), bert_tokenizer("hello").input_ids, bert_tokenizer.cls_token_id)
