-- users: who is connected to one worker is added to those who are counted, and the count lives on.
--
-- KEYS[1]  ts:{fleet}:users:<life>, a HyperLogLog
-- KEYS[2]  if it is being made anew: ts:{fleet}:users:<life>:anew, another one
-- ARGV     ms for which they live from now, what becomes of the second ('' nothing, 'begin': it is
--          empty before this, 'end': it takes the place of the first after this, 'both'), users
-- Reply    1 if there is anybody in the first now
--
-- In a script because neither may be left without an end, whatever dies when.

local call = redis.call
local lasts, step = ARGV[1], ARGV[2]

local function add(key)
  local added = redis.pcall('PFADD', key, unpack(ARGV, 3))
  if type(added) == 'table' then
    if not added.err:find('WRONGTYPE', 1, true) then return added end
    call('DEL', key)
    call('PFADD', key, unpack(ARGV, 3))
  end
end

if step == 'begin' or step == 'both' then call('DEL', KEYS[2]) end
if #ARGV > 2 then
  for _, key in ipairs(KEYS) do
    local refused = add(key)
    if refused then return refused end
  end
end
if step == 'end' or step == 'both' then
  if call('EXISTS', KEYS[2]) == 1 then
    call('RENAME', KEYS[2], KEYS[1])
  else
    call('DEL', KEYS[1])
  end
end
for _, key in ipairs(KEYS) do call('PEXPIRE', key, lasts) end
return call('EXISTS', KEYS[1])
