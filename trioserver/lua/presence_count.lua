-- presence_count: how many different users of workers that live are in some of the entries.
--
-- ARGV     channel (not used), where to begin (as ZRANGEBYLEX wants it), entries to look at, the
--          user who was counted last or nothing, lives that are over
-- Reply    {how many, where to go on or nothing, the user who was counted last}

local over, users, last = {}, 0, ARGV[4]
for i = 5, #ARGV do over[ARGV[i]] = true end
local most = tonumber(ARGV[3])
local page = call('ZRANGEBYLEX', MEMBERS, ARGV[2], '+', 'LIMIT', 0, most)
for i = 1, #page do
  local user = user_of(page[i])
  if user ~= last and not over[life_of(page[i])] then users, last = users + 1, user end
end
return { users, #page == most and '(' .. page[most] or '', last }
